"""Networks that tasks offer, and the module that puts a data set's preprocessing around one."""
