"""Object stores: how they are addressed, asked, written to and read from."""
