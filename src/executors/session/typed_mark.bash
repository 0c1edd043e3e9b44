# Only the shell can reset the terminal's modes. `read -s` turns the echo off before it prints ASK. If the
# response does not arrive as typed, other modes are wrong too: reset them and ask again.
builtin set -- "$1" "$2" $'\001'"$5"$'\001' a "$5"
while [[ 1 ]]; do
  builtin read -rs -p "$3" __agent_line </dev/tty 2>/dev/tty
  case $? in
    0)
      [[ ${__agent_line:32} == "$4"@TAIL@.. ]] && builtin break
      builtin command -p stty sane -echo </dev/tty
      case $4 in
        a) builtin set -- "$1" "$2" $'\001'"$5"$'\001' b "$5" ;;
        b) builtin set -- "$1" "$2" $'\001'"$5"$'\001' c "$5" ;;
        *) builtin return ;;
      esac
      ;;
    # A trapped signal may interrupt `read`. Read again without asking again: the agent responds once.
    129 | 1[3-9]? | 2??) builtin set -- "$1" "$2" '' "$4" "$5" ;;
    *) builtin command -p stty sane -echo </dev/tty && builtin set -- "$1" "$2" '' "$4" "$5" || builtin return ;;
  esac
done
