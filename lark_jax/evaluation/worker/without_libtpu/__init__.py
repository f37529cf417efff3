"""Put first on the search path of processes that must not find libtpu."""
