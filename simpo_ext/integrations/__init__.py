"""simpo_ext in the trainers in use, a module for each; nothing here is imported unasked."""
