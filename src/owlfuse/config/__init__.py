"""A configuration: composed from yamls and overrides, checked, built from, and known by its
hash."""
