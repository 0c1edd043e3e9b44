# Runs a program of the image, whatever the job has made of PATH and of its environment.
__agent_program() (
  builtin unset IFS
  builtin export -n $(builtin compgen -e)
  builtin command -p "$@" || { [[ $? == 127 ]] && builtin command "$@"; }
)
__agent_receive() {
  builtin printf '' >|"$1" || builtin return
  builtin set -- "$1" $'\001'@TAKE@$'\001'
  while [[ 1 ]]; do
    builtin read -rs -p "$2" __agent_line </dev/tty 2>/dev/tty
    case $? in
      0) ;;
      # A trapped signal may end it early. The answer still comes, and only one.
      129 | 1[3-9]? | 2??) builtin set -- "$1" '' && builtin continue ;;
      *) builtin return 1 ;;
    esac
    # What is around it keeps its white space from the job's IFS.
    __agent_line=${__agent_line#.}
    __agent_line=${__agent_line%..}
    [[ $__agent_line ]] || builtin return 0
    builtin printf %b "$__agent_line" >>"$1" || builtin return
    builtin set -- "$1" $'\001'@TAKE@$'\001'
  done
}
__agent_take() {
  __agent_watch "$3"
  if [[ ${4-} ]]; then
    builtin printf %b "$4" >|'@FILE@'
  else
    __agent_receive '@FILE@'
  fi || {
    builtin printf '%s\n' "The command was not run: it can't be written to @FILE@." >/dev/tty
    # Throws the shell back to its prompt.
    case ${99:?} in esac
  } 2>/dev/null
  [[ ! ${2-} ]] || builtin shopt -s expand_aliases
  builtin return "$1"
}
# Nobody else can see to the terminal's modes. Its echo is off before the question is shown, whatever the job has
# set; an answer that does not come through as it is typed tells that more is wrong.
__agent_mark() {
  builtin set -- "$1" $'\001'"$1"$'\001' a
  while [[ 1 ]]; do
    builtin read -rs -p "$2" __agent_line </dev/tty 2>/dev/tty
    case $? in
      0)
        [[ ${__agent_line:32} == "$3"@TAIL@.. ]] && builtin return
        builtin command -p stty sane -echo </dev/tty
        case $3 in
          a) builtin set -- "$1" $'\001'"$1"$'\001' b ;;
          b) builtin set -- "$1" $'\001'"$1"$'\001' c ;;
          *) builtin return ;;
        esac
        ;;
      # As above.
      129 | 1[3-9]? | 2??) builtin set -- "$1" '' "$3" ;;
      *) builtin command -p stty sane -echo </dev/tty && builtin set -- "$1" '' "$3" || builtin return ;;
    esac
  done
}
# Waits for the first character of the next line: all of it is typed while the echo is off, however it
# was set.
__agent_tell() {
  builtin set -- "$1" ''
  while [[ 1 ]]; do
    builtin read -rs -n 1 -p "$1" __agent_line </dev/tty 2>/dev/tty
    [[ $? -gt 128 ]] || builtin break
    builtin set -- ''
  done
}
builtin command -p stty -echo </dev/tty 2>/dev/null
__agent_line=$(builtin umask)
builtin umask 077
builtin printf '' >|'@FILE@'
builtin umask "$__agent_line"
[[ -w '@FILE@' ]]
