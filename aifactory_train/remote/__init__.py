"""Sites over OpenSSH: what is known about them, the connection, the program that answers there, and what goes over."""
