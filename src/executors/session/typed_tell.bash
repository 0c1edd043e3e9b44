# Prints the frame, and waits with the echo off for the first character of the next line. So the whole line is
# typed while the echo is off, whatever the job has set.
builtin set -- "$1" "$2" "$__agent_line"
while [[ 1 ]]; do
  builtin read -rs -n 1 -p "$3" __agent_line </dev/tty 2>/dev/tty
  [[ $? -gt 128 ]] || builtin break
  builtin set -- "$1" "$2" ''
done
