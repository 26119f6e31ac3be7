"""Commands beside training; no file of the program imports them."""
