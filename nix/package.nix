# All programs of the workspace, in one derivation. `programs` selects what is installed,
# so that a relay host need not carry the coordinator.
{
  lib,
  rustPlatform,
  util-linux,
  pname ? "lacis",
  programs ? [
    "lacis"
    "lacisd"
    "lacis-coordinator"
    "lacis-relay"
  ],
  mainProgram ? "lacis",
  # Lists of what a build sees.
  sources ? [ ./source.txt ],
}:
let
  manifest = builtins.fromTOML (builtins.readFile ../Cargo.toml);
  crateOf = {
    lacis = "lacis-cli";
    lacisd = "lacis-client";
    lacis-coordinator = "lacis-coordinator";
    lacis-relay = "lacis-relay";
    lacis-lab = "lacis-lab";
  };
  lines = file: lib.filter (line: line != "") (lib.splitString "\n" (builtins.readFile file));
  units = lib.filter (unit: lib.elem (lib.removeSuffix ".service" unit) programs) (
    lib.attrNames (builtins.readDir ../packaging/systemd)
  );
in
rustPlatform.buildRustPackage {
  inherit pname;
  inherit (manifest.workspace.package) version;

  # Only what compiler and tests read: a change in docs or scenarios builds nothing again. scripts/test runs the tests
  # where they see the same files and no others.
  src = lib.fileset.toSource {
    root = ../.;
    fileset = lib.fileset.unions (map (path: ../. + "/${path}") (lib.concatMap lines sources));
  };
  cargoLock.lockFile = ../Cargo.lock;
  cargoBuildFlags = lib.concatMap (program: [
    "-p"
    crateOf.${program}
  ]) programs;
  # What needs namespaces or /dev/net/tun skips itself, aloud; scenarios run in the VM tests.
  cargoTestFlags = lib.concatMap (program: [
    "-p"
    crateOf.${program}
  ]) programs;
  strictDeps = true;

  postInstall = lib.concatMapStrings (unit: ''
    install -Dm644 packaging/systemd/${unit} $out/lib/systemd/system/${unit}
    substituteInPlace $out/lib/systemd/system/${unit} --replace-fail /usr/bin/ $out/bin/ --replace-quiet /bin/kill ${util-linux}/bin/kill
  '') units;

  meta = {
    inherit (manifest.workspace.package) description;
    homepage = manifest.workspace.package.repository;
    license = with lib.licenses; [
      mit
      asl20
    ];
    inherit mainProgram;
    platforms = lib.platforms.linux;
  };
}
