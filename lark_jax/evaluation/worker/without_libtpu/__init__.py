"""A folder to put in front of the search path of processes in which libtpu must not be found."""
