"""The attention of an answer to the pictures of its prompt, as maps and as a contact sheet."""
