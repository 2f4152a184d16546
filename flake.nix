{
  description = "Lacis: a mesh VPN that is declared in a flake";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-26.05";

  outputs =
    { self, nixpkgs }:
    let
      inherit (nixpkgs) lib;
      systems = [
        "x86_64-linux"
        "aarch64-linux"
      ];
      eachSystem = f: lib.genAttrs systems (system: f nixpkgs.legacyPackages.${system});
      packagesFor = pkgs: import ./nix/packages.nix { inherit pkgs; };
      # Topologies of the scenarios of tests/ that run nobody else's programs: services are those that virtual machines
      # know how to run. Optional hosts with others are left out there.
      topologies = lib.filterAttrs (
        _: topology:
        !(topology ? programs)
        && lib.subtractLists [ "coordinator" "relay" "lacisd" ] (
          lib.concatMap (host: host.services or [ ]) (
            lib.filter (host: !(host.optional or false)) (lib.attrValues topology.hosts)
          )
        ) == [ ]
      ) (
        lib.mapAttrs (name: _: fromTOML (builtins.readFile ./tests/${name}/topology.toml)) (
          lib.filterAttrs (_: kind: kind == "directory") (builtins.readDir ./tests)
        )
      );
      # Each of them with its script, in virtual machines (these need KVM).
      vmTests =
        pkgs:
        lib.mapAttrs (
          name: _:
          pkgs.testers.runNixOSTest {
            imports = [ ./nix/vm-test.nix ];
            _module.args = {
              scenario = ./tests/${name};
              packages = packagesFor pkgs;
            };
          }
        ) topologies;
      # A module that takes its program from this flake unless the user says otherwise, so that nobody needs the overlay.
      # The key lets `default` and a single module be imported side by side.
      module = name: package: {
        key = "lacis/${name}";
        imports = [
          ./nixos-modules/${name}.nix
          (
            { lib, pkgs, ... }:
            {
              services.lacis.${name}.package =
                lib.mkDefault
                  self.packages.${pkgs.stdenv.hostPlatform.system}.${package};
            }
          )
        ];
      };
    in
    {
      packages = eachSystem (
        pkgs:
        let
          packages = packagesFor pkgs;
        in
        packages // { default = packages.lacis; }
      );

      overlays.default = final: _: packagesFor final;

      nixosModules = {
        coordinator = module "coordinator" "lacis-coordinator";
        relay = module "relay" "lacis-relay";
        client = module "client" "lacis";
        default.imports = [
          self.nixosModules.coordinator
          self.nixosModules.relay
          self.nixosModules.client
        ];
      };

      devShells = eachSystem (pkgs: {
        default = pkgs.mkShell {
          packages = with pkgs; [
            cargo
            rustc
            clippy
            rustfmt
            rust-analyzer
            cargo-deny
            nftables
            iproute2
            iputils
            conntrack-tools
            iperf3
            (miniupnpd.override { firewall = "nftables"; })
            dnsutils
            wireguard-tools
            libfaketime
            python3
            curl
          ];
        };
      });

      formatter = eachSystem (pkgs: pkgs.nixfmt-tree);

      # nix build .#vm.roaming
      legacyPackages = eachSystem (pkgs: {
        vm = vmTests pkgs;
        # The modules and the documents' snippets, evaluated; the programs check what comes of them.
        modules = import ./nix/module-tests.nix {
          inherit nixpkgs;
          scenarios = lib.attrNames topologies;
          pkgs = import nixpkgs {
            inherit (pkgs.stdenv.hostPlatform) system;
            overlays = [ self.overlays.default ];
          };
        };
      });

      checks = eachSystem (
        pkgs:
        # Evaluating all machines of all scenarios at once takes more memory than most hosts have, so one is enough here.
        packagesFor pkgs // { vm-demo = (vmTests pkgs).demo; }
      );
    };
}
