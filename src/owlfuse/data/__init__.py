"""Samples of any format, drawn from a mixture, encoded as chats and collated into batches."""
