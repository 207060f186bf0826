"""The server's commands of the `calotype` command line."""
