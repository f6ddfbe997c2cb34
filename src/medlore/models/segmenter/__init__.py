"""The text-prompted segmenter: network, text, prompts, vocabulary, published files, packs."""
