# Runs a program of the image, independent of the job's PATH and exported variables.
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
      # A trapped signal may interrupt `read`. Read again without asking again: the agent responds once.
      129 | 1[3-9]? | 2??) builtin set -- "$1" '' "${3-}" "${4-}" && builtin continue ;;
      # The job's modes (`stty -icanon min 0`) may still be set, if the response to the last mark arrived at once. What
      # was read so far is the beginning of the line.
      *)
        [[ ${4-} != xxx ]] && builtin command -p stty sane -echo </dev/tty || builtin return 1
        builtin set -- "$1" '' "${3-}$__agent_line" "${4-}x" && builtin continue
        ;;
    esac
    __agent_line=${3-}$__agent_line
    # The dots around the part protect its white space from the job's IFS.
    __agent_line=${__agent_line#.}
    __agent_line=${__agent_line%..}
    [[ $__agent_line ]] || builtin return 0
    builtin printf %b "$__agent_line" >>"$1" || builtin return
    builtin set -- "$1" $'\001'@TAKE@$'\001'
  done
}
# Throws the shell back to its prompt, so that a script that was not written whole is not sourced.
__agent_unwritten() {
  builtin printf '%s\n' "The command was not run: its script can't be written to @FILE@ in the container." >/dev/tty
  { case ${99:?} in esac; } 2>/dev/null
}
builtin command -p stty -echo </dev/tty 2>/dev/null
__agent_line=$(builtin umask)
builtin umask 077
builtin printf '' >|'@FILE@'
builtin umask "$__agent_line"
