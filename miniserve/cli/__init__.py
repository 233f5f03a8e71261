EXIT_FAILURE, EXIT_USAGE = 1, 2  # a failure; an error that the user can correct
