"""What protects the owner's model: copies of it that are degraded, capped and marked."""
