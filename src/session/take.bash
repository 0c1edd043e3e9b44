__agent_receive() {
  builtin local __agent_part
  : >|"$1" || builtin return
  while IFS= builtin read -rs -p $'\001'@TAKE@$'\001' __agent_part </dev/tty 2>/dev/tty && [[ $__agent_part ]]; do
    builtin printf %b "$__agent_part" >>"$1" || builtin return
  done
}
__agent_take() {
  builtin local __agent_status="$?"
  __agent_begin
  if [[ ${1-} ]]; then
    builtin printf '\001%s\001' '@TAKE@' >/dev/tty
    builtin printf %b "$1" >|'@FILE@'
  else
    __agent_receive '@FILE@'
  fi
  builtin return "$__agent_status"
}
__agent_umask=$(builtin umask)
builtin umask 077
: >|'@FILE@'
builtin umask "$__agent_umask"
builtin unset __agent_umask
[[ -w '@FILE@' ]]
