"""Files of many records, read by number: lines of text, and members of tar archives."""
