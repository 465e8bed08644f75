"""What turns the outputs of the ops into what the public functions return."""
