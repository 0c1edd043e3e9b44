# Read with aliases off. A job may define anything: what is called at run time is `builtin`, whose function of
# that name each end of a script removes, and what may be readonly is not assigned to.
__agent_watch() {
  # The job may have a prompt command of its own, and keeps it.
  [[ ${PROMPT_COMMAND-} == *__agent_prompt* ]] ||
    builtin printf -v PROMPT_COMMAND '%s\n%s' "${PROMPT_COMMAND-}" '{ [[ ! ${PS1-} ]] || \__agent_prompt; } 2>/dev/null' 2>/dev/null
  builtin printf -v __agent_at %s "$1"
  __agent_prompt
}
# The escapes of a prompt: the text itself is no frame.
__agent_prompt() {
  builtin printf -v PS1 '\\001%s %s\\001' @PROMPT@ "${__agent_at-}" 2>/dev/null
}
__agent_ready() {
  __agent_watch "$3"
  [[ ! ${2-} ]] || builtin shopt -s expand_aliases
  builtin return "$1"
}
__agent_begin() {
  builtin printf '\001%s\001' "$2" >/dev/tty
  [[ ${3-} != *V* ]] || builtin set -o vi
  [[ ${3-} != *M* ]] || builtin set -o emacs
  [[ ${3-} != *R* ]] || builtin set -o history
  [[ ${3-} != *D* ]] || builtin shopt -s extdebug
  [[ ! ${4-} ]] || builtin set "-$4"
  builtin return "$1"
}
__agent_end() {
  # Special builtins come before functions only in POSIX mode.
  [[ :$3: == *:posix:* ]] || POSIXLY_CORRECT=y
  unset -f builtin
  set +vxET
  [[ :$3: == *:posix:* ]] || set +o posix
  if builtin printf -v __agent_line . && builtin set +o emacs +o vi +o history && builtin shopt -u expand_aliases extdebug &&
    builtin unset -v __agent_line && builtin read -rn 0 __agent_line </dev/null; then
    # Leaving POSIX mode forgets these.
    [[ :$4: == *:inherit_errexit:* ]] || builtin shopt -u inherit_errexit
    [[ :$4: == *:interactive_comments:* ]] || builtin shopt -u interactive_comments
    [[ :$4: == *:sourcepath:* ]] || builtin shopt -u sourcepath
    [[ :$4: != *:shift_verbose:* ]] || builtin shopt -s shift_verbose
    [[ :$4: != *:expand_aliases:* ]] || builtin set -- "$1" "${2}A" "$3" "$4" "$5"
    [[ :$4: != *:extdebug:* ]] || builtin set -- "$1" "${2}D" "$3" "$4" "$5"
    [[ :$3: != *:vi:* ]] || builtin set -- "$1" "${2}V" "$3" "$4" "$5"
    [[ :$3: != *:history:* ]] || builtin set -- "$1" "${2}R" "$3" "$4" "$5"
    [[ :$3: != *:emacs:* ]] || builtin set -- "$1" "${2}M" "$3" "$4" "$5"
    builtin unset PS1 PS2
    __agent_mark "$5"
    builtin set -- "$1" "$2" "${SEMAPHORE_JOB_RESULT-}"
    builtin set -- "$1" "$2" "${3:0:64}"
    builtin printf -v __agent_line '\001%s %s %s %s\001' "${__agent_line:0:32}" "$1" "$2" "${3//[[:cntrl:]]/?}"
    __agent_tell "$__agent_line"
    builtin unset -v __agent_line __agent_at __agent_options __agent_boot
  fi 2>/dev/null
  builtin return "$1"
}
# The agent sees to the terminal's modes when it is asked.
__agent_mark() {
  builtin printf '\001%s\001' "$1" >/dev/tty
  while [[ 1 ]]; do
    builtin read -r __agent_line </dev/tty && [[ ${#__agent_line} -ge 34 && $__agent_line == *.. ]] && builtin return
  done
}
__agent_tell() {
  builtin printf %s "$1" >/dev/tty
}
builtin unset PROMPT_COMMAND PS0 MAILCHECK 2>/dev/null
builtin set +o history
builtin history -c
builtin unset HISTFILE 2>/dev/null
