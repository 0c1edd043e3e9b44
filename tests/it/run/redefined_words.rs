//! Definitions of a job or a profile do not change the words that the session itself uses: the next commands
//! run unchanged, and a failing command fails the job.

use std::process::Command;

use serde_json::{Value, json};

use test_support::changed_shell::{
    DOCKER_JOB, SECOND, SHORT_JOB, THIRD, assert_none, failed_cases, failed_changes, failure,
    run_within, unexplained_failure, with_change, with_startup_file, without_change, words_of_bash,
};
use test_support::docker::{job, leftovers_of};
use test_support::{World, job_of};

fn shell_job(commands: &[&str]) -> Value {
    serde_json::from_str(&job_of(commands)).unwrap()
}

/// Returns the failure of a shell job after a command that makes this change.
fn failure_of(change: &str) -> Option<String> {
    let job = shell_job(&with_change(change));
    failure(run_within(&World::new(), SHORT_JOB, &job, |_| {}).as_ref(), true)
}

/// Returns the failure of such a job, unless its log explains it.
fn unexplained_failure_of(change: &str) -> Option<String> {
    let job = shell_job(&with_change(change));
    unexplained_failure(run_within(&World::new(), SHORT_JOB, &job, |_| {}).as_ref())
}

/// Returns the failure of a shell job after a profile that makes this change.
fn failure_of_profile(change: &str) -> Option<String> {
    let world = World::new();
    std::fs::write(world.home().join(".bash_profile"), format!("{change}\n")).unwrap();
    let mut job = shell_job(&without_change());
    job["env_vars"] = json!([{ "name": "V", "value": "dmFsdWU=" }]);
    failure(run_within(&world, SHORT_JOB, &job, |_| {}).as_ref(), false)
}

/// Returns the failure of a shell job of an agent with such an environment.
fn failure_of_environment(change: &Command) -> Option<String> {
    let job = shell_job(&without_change());
    let adapt = |agent: &mut Command| {
        let variables = change.get_envs().filter_map(|(name, value)| Some((name, value?)));
        agent.envs(variables);
    };
    failure(run_within(&World::new(), SHORT_JOB, &job, adapt).as_ref(), false)
}

/// Returns the failure of a Docker job with short and long scripts, after a command that makes this change.
fn failure_in_container(change: &str) -> Option<String> {
    let mut commands = with_change(change).map(str::to_owned);
    commands[2] = format!("{SECOND} # {}", "long ".repeat(2000));
    let job = job("bash", &commands.each_ref().map(String::as_str));
    let finished = run_within(&World::new(), DOCKER_JOB, &job, |_| {});
    failure(finished.as_ref(), true).or_else(|| left(&job))
}

/// Returns the failure of such a job, unless its log explains it.
fn unexplained_failure_in_container(change: &str) -> Option<String> {
    let job = job("bash", &with_change(change));
    let finished = run_within(&World::new(), DOCKER_JOB, &job, |_| {});
    unexplained_failure(finished.as_ref()).or_else(|| left(&job))
}

/// Returns the failure of a Docker job after a startup file that makes this change.
fn failure_of_startup_file(change: &str) -> Option<String> {
    let mut job = job("bash", &without_change());
    with_startup_file(&mut job, change);
    job["env_vars"] = json!([{ "name": "V", "value": "dmFsdWU=" }]);
    job["files"] = json!([{ "path": "a/f", "content": "eA==", "mode": "0600" }]);
    let finished = run_within(&World::new(), DOCKER_JOB, &job, |_| {});
    failure(finished.as_ref(), false).or_else(|| left(&job))
}

fn left(job: &Value) -> Option<String> {
    let left = leftovers_of(job);
    (!left.is_empty()).then(|| format!("left: {left:?}"))
}

/// Returns all words that can begin a command and are not names of programs.
fn words() -> Vec<String> {
    let mut words = words_of_bash("builtin");
    words.extend(words_of_bash("keyword"));
    assert!(words.len() > 70, "{words:?}");
    words
}

fn alias_of(word: &String) -> String {
    format!("alias '{word}=/bin/echo hijacked'")
}

fn function_of(word: &String) -> String {
    format!("function {word} {{ /bin/echo hijacked; }}")
}

fn aliases_of(words: &[String]) -> String {
    let changes: Vec<_> = words.iter().map(alias_of).collect();
    // The whole list is read before it is executed; otherwise the aliases would change it.
    format!("{{ shopt -s expand_aliases; {}; }}", changes.join("; "))
}

fn all_aliases() -> String {
    aliases_of(&words())
}

fn all_functions() -> String {
    words().iter().map(function_of).collect::<Vec<_>>().join("\n")
}

fn all_exported_functions() -> String {
    format!("set -a\n{}", all_functions())
}

fn all_ways() -> [String; 4] {
    let both = format!("{}\n{}", all_functions(), all_aliases());
    [all_aliases(), all_functions(), all_exported_functions(), both]
}

/// A script that sets `$names` to the session's functions and variables in the shell, as far as a job can see
/// them.
const NAMES_OF_THE_SESSION: &str = "names=$({ compgen -A function; compgen -v; declare -f; } | grep -oE '\\b_+agent[a-z_]*' | sort -u)";

fn changes_of_the_sessions_own_names() -> Vec<String> {
    [
        "for name in $names; do alias $name='/bin/echo hijacked'; done",
        "for name in $names; do eval \"$name() { /bin/echo hijacked; }\"; done 2>/dev/null",
        "readonly $names 2>/dev/null",
        "for name in $names; do readonly $name=1; done 2>/dev/null",
        "declare -i $names 2>/dev/null",
        "declare -u $names 2>/dev/null",
        "declare -x $names 2>/dev/null",
        "for name in $names; do unset $name; declare -n $name=HOME; done 2>/dev/null",
        "for name in $names; do unset $name; declare -A $name; done 2>/dev/null",
        "unset $names 2>/dev/null",
        "unset -f $names 2>/dev/null",
        "unset -f $(compgen -A function) 2>/dev/null",
        "unset $(compgen -v) 2>/dev/null",
        "readonly -f $(compgen -A function) 2>/dev/null",
        "export -f $(compgen -A function) 2>/dev/null",
    ]
    .map(|change| format!("{NAMES_OF_THE_SESSION}; {change}; true"))
    .into()
}

/// Returns commands that set or clear every option of bash, except those that print commands or end the
/// shell.
fn options() -> Vec<String> {
    let ends_or_shows = ["errexit", "onecmd", "xtrace", "verbose"];
    let set = words_of_bash("setopt").into_iter();
    let set = set.filter(|option| !ends_or_shows.contains(&option.as_str()));
    let shopt = words_of_bash("shopt").into_iter();
    let mut changes: Vec<_> =
        set.flat_map(|o| [format!("set -o {o}"), format!("set +o {o}")]).collect();
    changes.extend(shopt.flat_map(|o| [format!("shopt -s {o}"), format!("shopt -u {o}")]));
    // Some options can't be changed; the job ignores these errors.
    let changes: Vec<_> =
        changes.into_iter().map(|change| format!("{change} 2>/dev/null; true")).collect();
    assert!(changes.len() > 100, "{changes:?}");
    changes
}

const SEVERAL_OPTIONS: [&str; 6] = [
    "shopt -s extglob nocasematch nullglob failglob dotglob globstar nocaseglob",
    "set -f -u -k -a -C; set -o ignoreeof",
    "set -k; set -o posix",
    "set -k -a -u -o pipefail; shopt -s expand_aliases localvar_inherit localvar_unset",
    "shopt -s compat31 xpg_echo lastpipe; shopt -u sourcepath interactive_comments",
    "set -E -T -o posix; shopt -s extdebug",
];

/// Variables with a meaning for the shell, set so that they would change its behaviour.
const VARIABLES: [&str; 34] = [
    "IFS=0123456789",
    "IFS=abcdefghijklmnopqrstuvwxyz_",
    "IFS=\"0123456789abcdef '\\\\\\\"_\"",
    "IFS=; readonly IFS",
    "readonly IFS=/0a",
    "declare -i IFS; true",
    "readonly _ 2>/dev/null; true",
    "readonly PROMPT_COMMAND",
    "readonly PROMPT_COMMAND=",
    "unset PROMPT_COMMAND; declare -A PROMPT_COMMAND=([a]=b)",
    "PROMPT_COMMAND=(':' '/bin/true')",
    "readonly PS0= PS1= PS2= PS4=",
    "PS0='$(/bin/echo prompt)' PS1='$(/bin/echo prompt)' PS2='$(/bin/echo prompt)'",
    "readonly REPLY=1",
    "declare -i REPLY; readonly REPLY",
    "readonly OPTIND OPTARG TIMEFORMAT MAILCHECK",
    "readonly HISTFILE=~/history HISTSIZE=100 HISTCONTROL=ignorespace; set -o history",
    "readonly SEMAPHORE_JOB_RESULT=",
    "TMOUT=1",
    "FUNCNEST=1",
    "PATH=; hash -r",
    "PATH=/nowhere; readonly PATH",
    "unset PATH",
    "EXECIGNORE='*'; GLOBIGNORE='*'",
    "BASH_ENV=~/evil; ENV=~/evil; export BASH_ENV ENV; /bin/echo '/bin/echo hijacked' >~/evil",
    "POSIXLY_CORRECT=1",
    "readonly POSIXLY_CORRECT=1",
    "BASH_COMPAT=3.2",
    "exec 9>/dev/null; BASH_XTRACEFD=9",
    "LC_ALL=xx LANG=xx; LC_ALL=C",
    "export LC_ALL=C.UTF-8 LANG=C.UTF-8",
    "TERM=; COLUMNS=1; LINES=1",
    "unset HOME; HOME=/nowhere; unset PWD OLDPWD",
    "umask 777",
];

const HASHES_AND_TRAPS: [&str; 15] = [
    "hash -p /bin/false cat stty rm mkdir chmod mv mkfifo base64 head",
    "hash -p /bin/false builtin . printf read",
    "set +h",
    "trap ': $((x++))' DEBUG",
    "set -T; trap ': $((x++))' DEBUG",
    "set -T; trap '/bin/true' RETURN",
    "trap '(exit 9)' RETURN; set -T",
    "set -E; trap ': $((x++))' ERR",
    "trap 'read -t 0 x' DEBUG",
    "trap ': left' EXIT",
    "trap ': x' USR1 USR2 CHLD CONT WINCH ALRM",
    "trap '' INT TERM HUP QUIT TSTP TTIN TTOU PIPE ALRM USR1 USR2",
    "trap 'x=y' TTIN TTOU; set +m",
    "(while kill -WINCH $$; do /bin/sleep 0.01; done) 2>/dev/null & trap : WINCH",
    "unalias -a; enable -a >/dev/null; shopt -u expand_aliases",
];

fn owned(cases: &[&str]) -> Vec<String> {
    cases.iter().map(|case| (*case).to_owned()).collect()
}

/// Makes changes of a few words at a time, to run fewer jobs.
fn in_groups(words: &[String], change_of: impl Fn(&String) -> String) -> Vec<String> {
    let all = |words: &[String]| words.iter().map(&change_of).collect::<Vec<_>>().join("\n");
    words.chunks(4).map(all).collect()
}

#[test]
fn no_alias_changes_the_sessions_input() {
    // An alias that ends with a space makes bash expand the next word, too.
    let first = ["builtin", "command", "{", "[[", "!", "if", "while", ".", "eval", "source"];
    let chain: String = first.iter().map(|word| format!("alias '{word}={word} '; ")).collect();
    let rest = words().into_iter().filter(|word| !first.contains(&word.as_str()));
    let rest: Vec<_> = rest.map(|word| alias_of(&word)).collect();
    let chain = format!("{{ {chain} {}; }}", rest.join("; "));
    let aliases = words().chunks(4).map(aliases_of).chain([chain]).collect::<Vec<_>>();
    assert_none(&failed_changes(aliases, failure_of));
}

#[test]
fn no_function_changes_the_sessions_calls() {
    assert_none(&failed_changes(in_groups(&words(), function_of), failure_of));
}

#[test]
fn redefining_all_words_at_once_does_not_change_the_session() {
    assert_none(&failed_changes(all_ways(), failure_of));
    assert_none(&failed_changes(all_ways(), failure_of_profile));
}

#[test]
fn redefining_the_sessions_own_names_works_or_is_reported() {
    assert_none(&failed_changes(changes_of_the_sessions_own_names(), unexplained_failure_of));
}

#[test]
fn shell_options_do_not_change_the_session() {
    let changes = options().into_iter().chain(owned(&SEVERAL_OPTIONS));
    assert_none(&failed_changes(changes, failure_of));
}

#[test]
fn variables_hash_entries_and_traps_do_not_change_the_session() {
    assert_none(&failed_changes(
        owned(&VARIABLES).into_iter().chain(owned(&HASHES_AND_TRAPS)),
        failure_of,
    ));
}

#[test]
fn a_profile_does_not_change_the_session() {
    let own_words = [".", "builtin", "eval", "source", "[[", "{", "read", "printf", "set", "unset"];
    let aliases = owned(&own_words).iter().map(alias_of).collect::<Vec<_>>();
    let several = owned(&SEVERAL_OPTIONS).into_iter().chain(owned(&VARIABLES));
    let changes = aliases.into_iter().chain(several).chain(owned(&HASHES_AND_TRAPS));
    // Profiles after which the shell never gets ready are tested elsewhere.
    assert_none(&failed_changes(changes, failure_of_profile));
}

#[test]
fn the_agents_environment_does_not_change_the_session() {
    let hijack = "() { /bin/echo hijacked; }";
    let mut all = Command::new("all");
    all.envs(words().iter().map(|word| (format!("BASH_FUNC_{word}%%"), hijack)));
    let variables = [
        ("SHELLOPTS", "keyword"),
        ("SHELLOPTS", "braceexpand:hashall:nounset:noglob:allexport:noclobber:keyword"),
        ("BASHOPTS", "extglob:nocasematch:nullglob:failglob:localvar_inherit"),
        ("POSIXLY_CORRECT", "1"),
        ("FUNCNEST", "1"),
        ("TMOUT", "1"),
        ("PROMPT_COMMAND", "/bin/echo hijacked"),
        ("PS1", "$(/bin/echo hijacked)"),
        ("BASH_ENV", "/nowhere"),
        ("IFS", "0123456789abcdef"),
    ];
    let variables = variables.map(|(name, value)| {
        let mut change = Command::new(name);
        change.env(name, value);
        change
    });
    let changes = variables.into_iter().chain([all]).map(Environment);
    assert_none(&failed_cases(changes, |change| failure_of_environment(&change.0)));
}

struct Environment(Command);

impl std::fmt::Display for Environment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0
            .get_envs()
            .take(1)
            .try_for_each(|(name, value)| write!(f, "{}={value:?}", name.display()))
    }
}

/// The job's own commands behave as in plain bash.
#[test]
fn redefinitions_of_a_job_apply_to_its_own_commands() {
    let commands = [
        "alias .=pwd echo='/bin/echo aliased'; printf() { /bin/echo function \"$@\"; }",
        "cd /; echo it; printf it; .",
        "set -k; set -f",
        "/bin/sh -c 'echo $V' V=keyword; /bin/echo *",
    ];
    let finished = run_within(&World::new(), SHORT_JOB, &shell_job(&commands), |_| {}).unwrap();
    let commands = finished.commands();
    assert_eq!(commands[1], ("aliased it\nfunction it\n/\n".into(), 0), "{commands:?}");
    assert_eq!(commands[3], ("keyword\n*\n".into(), 0), "{commands:?}");
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn commands_in_a_container_do_not_change_the_session() {
    let own = ["alias .=pwd", "alias builtin=/bin/true", "alias '[[=/bin/true'", "set -k"];
    let others = [
        "FUNCNEST=1",
        "readonly IFS=0123456789abcdef",
        "set -f -u -a -C; set -o ignoreeof",
        "hash -p /bin/false mkdir chmod cat stty",
        "set -T; trap ': $((x++))' DEBUG",
    ];
    let changes = all_ways().into_iter().chain(owned(&own)).chain(owned(&others));
    assert_none(&failed_changes(changes, failure_in_container));
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn redefining_the_sessions_own_names_in_a_container_works_or_is_reported() {
    let changes = changes_of_the_sessions_own_names();
    assert_none(&failed_changes(changes.into_iter().step_by(3), unexplained_failure_in_container));
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn a_startup_file_of_a_container_does_not_change_the_session() {
    let own = ["alias .=pwd builtin=/bin/true", "set -k", "FUNCNEST=1", "readonly IFS=/0a"];
    let hashes = ["hash -p /bin/false mkdir chmod cat stty", "set -f -u -a -C -T -E"];
    let changes = all_ways().into_iter().chain(owned(&own)).chain(owned(&hashes));
    assert_none(&failed_changes(changes, failure_of_startup_file));
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine")]
fn the_environment_of_a_container_does_not_change_the_session() {
    let hijack = "() { /bin/echo hijacked; }";
    let named = |name: &str, value: &str| json!({ "name": name, "value": test_support::base64(value.as_bytes()) });
    let environments = [
        json!(
            words()
                .iter()
                .map(|word| named(&format!("BASH_FUNC_{word}%%"), hijack))
                .collect::<Vec<_>>()
        ),
        json!([named("SHELLOPTS", "keyword:nounset:noglob"), named("FUNCNEST", "1")]),
        json!([named("POSIXLY_CORRECT", "1"), named("TMOUT", "1"), named("BASH_ENV", "/nowhere")]),
    ];
    assert_none(&failed_cases(environments, |environment| {
        let mut job = job("bash", &["/bin/echo before", SECOND, THIRD, "/bin/echo not reached"]);
        job["compose"]["containers"][0]["env_vars"] = environment.clone();
        let finished = run_within(&World::new(), DOCKER_JOB, &job, |_| {});
        failure(finished.as_ref(), false).or_else(|| left(&job))
    }));
}
