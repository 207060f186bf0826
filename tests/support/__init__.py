"""What several tests need: import it as `support.<module>`; pytest puts this folder's parent on the path."""
