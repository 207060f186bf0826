"""The client's commands of `calotype`. They need an extra: pip install 'calotype[cli]'."""
