"""Which parts of a picture an answer looked at, as maps and as a contact sheet."""
