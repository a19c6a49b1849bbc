"""Networks and their losses; no network knows a method."""
