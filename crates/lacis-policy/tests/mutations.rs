//! Damaged policies: `fuzz/mutate.rs` says how many, `fuzz/src/policy.rs` what must hold.

#[path = "../../../fuzz/mutate.rs"]
#[allow(unreachable_pub, missing_debug_implementations)]
mod mutate;
#[path = "../../../fuzz/src/policy.rs"]
#[allow(unreachable_pub)]
mod targets;

const WORDS: &[&str] = &[
    "null",
    "[]",
    "{}",
    "\"\"",
    "\"*\"",
    "\"*:*\"",
    "\"tag:a\"",
    "\"tag:\u{e9}\"",
    "\"group:g\"",
    "\"autogroup:member\"",
    "\"autogroup:internet\"",
    "\"autogroup:self\"",
    "\"host\"",
    "\"100.64.0.0/10\"",
    "\"fd7a:115c:a1e0::1\"",
    "\"a@b.c\"",
    "\"user:*@b.c\"",
    "\"tcp:80-443\"",
    "\"icmp:*\"",
    ":80,443",
    "// c\n",
    "/* c */",
    "\"acls\":[",
    "\"grants\":[",
    "\"ssh\":[",
    "\"tests\":[",
    "\"nodeAttrs\":[",
    "\"postures\":{",
    "\"via\":[\"tag:a\"],",
    "\"app\":{\"x/y\":[{}]},",
    "\"checkPeriod\":\"0s\",",
    "\"srcPosture\":[\"posture:p\"],",
    "- ",
    "? ",
    "&a ",
    "*a",
    "<<: ",
    "!!str ",
    "---\n",
    "|\n",
    "\u{2028}",
    "[[[[[[[[",
];

#[test]
fn policies_print_what_they_read_and_change_step_by_step_as_from_new() {
    // A compiled network is larger than the text: a star stands for all four nodes, and rules are kept for each.
    mutate::Target::new("policy").words(WORDS).memory(2048, 2 << 20).run(targets::policy);
}
