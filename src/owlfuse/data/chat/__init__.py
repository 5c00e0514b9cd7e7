"""A chat as tokens and labels: tokenizer, template, encoder, supervision and truncation."""
