# The configuration file of a program, checked by itself when the system is built: a bad declaration fails there, with
# the path and the nearest known key.
{ lib, pkgs }:
program:
{
  cfg,
  # What is written into the file.
  settings ? cfg.settings,
  # What is checked: the same, with the files that it names where they are while the system is built.
  declared ? settings,
}:
let
  canCheck = pkgs.stdenv.buildPlatform.canExecute pkgs.stdenv.hostPlatform;
  write =
    name: value:
    (pkgs.formats.json { }).generate "${program}${name}.json" (
      lib.filterAttrsRecursive (_: value: value != null) value
    );
  file = write "" settings;
in
{
  file =
    if cfg.validate && canCheck then
      pkgs.runCommand "${program}-checked.json" { nativeBuildInputs = [ cfg.package ]; } ''
        ${program} check --config ${write "-declared" declared}
        cp ${file} $out
      ''
    else
      file;
  warnings = lib.optional (cfg.validate && !canCheck) (
    "services.lacis.${lib.removePrefix "lacis-" program}.settings are not checked, because this system is built on another"
    + " platform: run `${program} check` there, or set validate = false."
  );
}
