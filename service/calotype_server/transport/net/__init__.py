"""What all ports share: addresses, certificates, credentials and limits."""
