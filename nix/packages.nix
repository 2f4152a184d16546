# The packages by name, for the flake, for its overlay and for those who use neither:
#   import ./nix/packages.nix { pkgs = import <nixpkgs> { }; }
{ pkgs }:
let
  build = pkgs.callPackage ./package.nix;
in
{
  # The client: daemon and command line.
  lacis = build {
    pname = "lacis";
    programs = [
      "lacis"
      "lacisd"
    ];
  };
  # The server, with the command line that administers it.
  lacis-coordinator = build {
    pname = "lacis-coordinator";
    programs = [
      "lacis-coordinator"
      "lacis"
    ];
    mainProgram = "lacis-coordinator";
  };
  lacis-relay = build {
    pname = "lacis-relay";
    programs = [ "lacis-relay" ];
    mainProgram = "lacis-relay";
  };
  # What the scenario `hostile` attacks with.
  lacis-lab = build {
    pname = "lacis-lab";
    programs = [ "lacis-lab" ];
    mainProgram = "lacis-lab";
    # Its tests read the scenarios.
    sources = [
      ./source.txt
      ./source-lab.txt
    ];
  };
}
