"""How people get in: passwords, second factors, sessions, and the record of all that."""
