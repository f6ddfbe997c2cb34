"""A shared base and one low-rank pair per expert: forms, dispatch, routing, surgery, interchange."""
