EXIT_FAILURE, EXIT_USAGE = 1, 2  # what failed here; what the user can mend
