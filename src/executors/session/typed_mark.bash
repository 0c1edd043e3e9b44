# Nobody but the shell can see to the terminal's modes. Its echo is off before the question is shown, whatever the
# job has set; an answer that does not come through as it is typed tells that more is wrong.
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
    # A trapped signal may end it early. The answer still comes, and only one.
    129 | 1[3-9]? | 2??) builtin set -- "$1" "$2" '' "$4" "$5" ;;
    *) builtin command -p stty sane -echo </dev/tty && builtin set -- "$1" "$2" '' "$4" "$5" || builtin return ;;
  esac
done
