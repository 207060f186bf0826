"""The client's commands of the `calotype` command line. They need the extra `calotype[cli]`."""
