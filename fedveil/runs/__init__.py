"""A run on disk: its configuration, directory, secrets, archive and logs."""
