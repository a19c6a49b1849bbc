"""Settings and plans of the methods, by kind; the registry names them."""
