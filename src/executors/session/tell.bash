builtin printf %s "$__agent_line" >/dev/tty
