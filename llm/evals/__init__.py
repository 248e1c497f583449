"""Numbers that can be compared: zero-shot tasks, perplexities and texts of any language model, by one set of rules."""
