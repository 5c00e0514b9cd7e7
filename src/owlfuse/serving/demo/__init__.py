"""`owlfuse demo`: a page in the browser to show pictures to one model or several, ask, and see
the answers side by side."""
