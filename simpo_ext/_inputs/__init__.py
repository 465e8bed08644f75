"""What turns the arguments of public functions into what the ops take: checks and layouts."""
