"""The commands: each file is one, whose `main` both `mugv-ds` and a script of tools/ call."""
