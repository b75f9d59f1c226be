"""What a server can recognise in an update, without reconstructing anything."""
