"""The pieces of `medlore decompose` for classification: settings, tasks, ranks, training, report."""
