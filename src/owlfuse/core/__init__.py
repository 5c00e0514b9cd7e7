"""What everything else stands on: types, errors, files, the environment and the terminal."""
