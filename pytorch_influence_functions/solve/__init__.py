"""How is the system solved? Each solver prepares once and answers for stacks of right-hand sides."""
