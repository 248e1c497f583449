"""The verbs of `unmask moe`, a module each."""
