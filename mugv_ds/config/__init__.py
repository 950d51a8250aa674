"""Configuration: the schema, its loading, and what is checked before anything is allocated."""
