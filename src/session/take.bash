__agent_receive() {
  builtin local __agent_part __agent_ask=$'\001'@TAKE@$'\001'
  : >|"$1" || builtin return
  while :; do
    IFS= builtin read -rs -p "$__agent_ask" __agent_part </dev/tty 2>/dev/tty
    case $? in
      0) ;;
      # As above.
      129 | 1[3-9]? | 2??) __agent_ask= && builtin continue ;;
      *) builtin return 1 ;;
    esac
    [[ $__agent_part ]] || builtin return 0
    builtin printf %b "$__agent_part" >>"$1" || builtin return
    __agent_ask=$'\001'@TAKE@$'\001'
  done
}
__agent_take() {
  builtin local __agent_status="$?"
  __agent_begin
  if [[ ${1-} ]]; then
    [[ :$SHELLOPTS: != *:emacs:* && :$SHELLOPTS: != *:vi:* ]] || builtin printf '\001%s\001' '@TAKE@' >/dev/tty
    builtin printf %b "$1" >|'@FILE@'
  else
    __agent_receive '@FILE@'
  fi
  builtin return "$__agent_status"
}
# Waits for the first character of the next line: all of it is typed while the echo is off, however it
# was set.
__agent_tell() {
  builtin local __agent_ask="$1" __agent_go
  while :; do
    IFS= builtin read -rs -n 1 -p "$__agent_ask" __agent_go </dev/tty 2>/dev/tty
    [[ $? -gt 128 ]] || builtin break
    __agent_ask=
  done
}
__agent_umask=$(builtin umask)
builtin umask 077
: >|'@FILE@'
builtin umask "$__agent_umask"
builtin unset __agent_umask
[[ -w '@FILE@' ]]
