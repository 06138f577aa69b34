"""`fastrot bench`: how fast this machine loads, turns and trains, with the evidence; and one machine beside another."""
