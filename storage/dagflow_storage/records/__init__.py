"""What a run keeps: its directory, ledger, journal and snapshots, and what is cleaned up when."""
