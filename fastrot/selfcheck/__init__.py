"""One command on a bare GPU machine: what is right, what is fast, which switches pay, in one folder of evidence."""
